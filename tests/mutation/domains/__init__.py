"""What each exercise may be given, a file a topic: written from the lesson and the docstrings, never from the checks."""
