"""Steps inside backward: each layer is normalized, stepped and freed as soon as its gradient is there."""
