"""From a batch to one step's statistics."""
