"""The pages of the docs site that are made from code: options, policies, callbacks, measures, metrics, errors, API."""
