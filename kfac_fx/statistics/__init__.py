"""Take the statistics of one step from its batches."""
