"""The mutation test of the graders: is every small change to a reference solution that matters rejected?

The code between ``<solution>`` marks of each lesson is changed mechanically, one place at a time (:mod:`.operators`).
A mutant *counts* if it does something else than the reference on one of 200 inputs from the exercise's *domain*
(:mod:`.domains`), which is written from the lesson's text alone and never sees the cases of the check. The grader has
to reject it (:mod:`.trials`). ``python -m tests.mutation`` brings ``report.json`` and ``REPORT.md`` up to date; a test
compares the fingerprints in there with the sources (:mod:`.report`).
"""
