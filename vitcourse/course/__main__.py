import sys

from vitcourse.commands.course import main

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a terminal may know fewer characters than we print
    sys.exit(main())
