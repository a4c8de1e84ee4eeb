import sys

from .cli import main

sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a terminal may know fewer characters than we print
sys.exit(main())
