"""Line plots and pages of them, which need nothing to be shown but a browser."""
