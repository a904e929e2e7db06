"""The mount: one FUSE session with requests and notifications."""
