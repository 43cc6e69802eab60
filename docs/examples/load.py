"""Opens one connection after the other for ten seconds, and counts what it was told."""

import collections
import time
import urllib.request

answers = collections.Counter()
end = time.monotonic() + 10
while time.monotonic() < end:
    try:
        with urllib.request.urlopen("http://127.0.0.1:8000/", timeout=5) as answer:
            answers[answer.read().decode().strip()] += 1
    except OSError as error:
        answers[repr(error)] += 1
for text, count in answers.items():
    print(f"{count:6}  {text}")
