"""Ctrl-C as a request: the step under way is finished before anything stops."""

import signal


class Interrupt:
    """While inside, the first Ctrl-C (or SIGTERM) only sets `asked`; a second Ctrl-C interrupts at once.

    with Interrupt() as interrupt:
        while not interrupt.asked:
            ...
    """

    asked = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
