"""Tiny random models of many families, for our tests and our users'."""
