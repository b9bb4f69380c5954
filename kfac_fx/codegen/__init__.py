"""Generate programs from a curvature graph."""
