"""What an arm64 guest is told and finds; all of it runs on any machine."""
