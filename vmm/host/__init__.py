"""What this host can do: KVM opened, probed by trying, and the scheme and backing that it has."""
