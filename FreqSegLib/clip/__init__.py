"""Image-text encoders behind one interface."""
