"""What people and continuous integration run besides the command line."""
