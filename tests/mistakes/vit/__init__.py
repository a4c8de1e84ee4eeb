"""Answers to the exercises of lesson 00.

Of a class the lesson gives ``__init__``, and the learner writes ``forward``; so do the answers here.
"""
