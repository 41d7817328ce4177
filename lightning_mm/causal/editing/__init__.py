"""MultEdit and its control: one association of a model changed in one weight, and how well that did."""
