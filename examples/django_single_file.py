"""Django in one file. A project has the same thing ready: hotport serve mysite.asgi:application.

pip install django 'hotport[asgi]'
hotport serve django_single_file:application
curl 'http://127.0.0.1:8000/?name=Ann'
"""

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

settings.configure(
    ROOT_URLCONF=__name__,
    SECRET_KEY="only for this example",
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
)


async def index(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"greeting": f"Hello, {request.GET.get('name', 'world')}!"})


urlpatterns = [path("", index)]

application = get_asgi_application()
