"""What each exercise may be given, a file a topic: written from lessons and docstrings, never from the checks."""
