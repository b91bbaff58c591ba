"""What appears on the screen: messages, progress, pictures, typed input."""
