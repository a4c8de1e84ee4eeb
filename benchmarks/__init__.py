import vitcourse  # noqa: F401 (before torch: how its threads wait)
