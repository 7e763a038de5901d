"""What the clients' machines can do: how fast they compute and send, and when they can be reached."""
