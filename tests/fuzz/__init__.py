"""Fuzzing: ``make fuzz`` (atheris, guided by coverage); ``tests/unit`` runs the same targets with Hypothesis."""
