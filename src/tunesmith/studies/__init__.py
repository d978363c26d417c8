"""What makes several runs, or looks at one from outside."""
