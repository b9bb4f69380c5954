"""The approximations of a block of the Fisher: one class each, and one table of them."""
