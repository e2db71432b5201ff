"""What a waiting replacement imports beforehand, in the launcher's tests."""
