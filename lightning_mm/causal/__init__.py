"""What a model does when something inside it is changed, and what that says about where things happen."""
