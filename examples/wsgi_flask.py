"""Flask, a WSGI framework, wrapped by a2wsgi: requests run in threads, and are finished across a restart.

pip install flask a2wsgi 'hotport[asgi]'
hotport serve wsgi_flask:app
curl http://127.0.0.1:8000/greetings/Ann
"""

from a2wsgi import WSGIMiddleware
from flask import Flask, Response, jsonify

flask = Flask(__name__)


@flask.get("/greetings/<name>")
def greet(name: str) -> Response:
    return jsonify(greeting=f"Hello, {name}!")


app = WSGIMiddleware(flask, workers=20)
