"""Answers to the exercises of lesson 02.

Of a class the lesson gives most of ``__init__``, and the learner writes the rest; so do the answers here.
"""
