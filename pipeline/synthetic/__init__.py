"""What is made up: drawn scenes, folders as the Hub has them, random checkpoints."""
