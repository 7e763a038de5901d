"""What Byzantine clients do: poison their data, or send something else than what they trained."""
