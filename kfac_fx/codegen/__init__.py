"""From the curvature graph to programs."""
