"""What clients send instead of D numbers, and what it weighs."""
