"""What appears on the screen: messages, progress, pictures, what is typed."""
