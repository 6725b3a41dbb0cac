"""Programs, devices and policies to start from: copy one, change it. Each is run by a test."""
