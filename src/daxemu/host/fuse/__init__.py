"""The mount: one FUSE session, its requests and notifications."""
