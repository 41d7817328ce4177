"""The embedded example: a small real model and its pictures, built from installed packages. Nothing else imports it."""
