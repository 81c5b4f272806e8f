"""What is read: files, their forms, their rows, and the images that rows name."""
