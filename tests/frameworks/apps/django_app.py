"""Django in one file: settings, views, both kinds of them, and its ASGI handler."""

import asyncio
import json as jsons

from common import BIG, HERE, SEEN, STATIC, chunks, told, torn, who
from django.conf import settings

VERSION = "v0"

if not settings.configured:
    settings.configure(
        ROOT_URLCONF="django_app",
        SECRET_KEY="test",
        ALLOWED_HOSTS=["127.0.0.1", "test"],
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        MIDDLEWARE=[
            "django.middleware.security.SecurityMiddleware",
            "django.middleware.gzip.GZipMiddleware",
            "django.middleware.http.ConditionalGetMiddleware",
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.middleware.common.CommonMiddleware",
            "django_app.stamp",
        ],
    )

from django.core.asgi import get_asgi_application  # noqa: E402  the settings come first
from django.http import (  # noqa: E402
    FileResponse,
    HttpResponse,
    HttpResponseNotModified,
    HttpResponseRedirect,
    JsonResponse,
    StreamingHttpResponse,
)
from django.urls import path, re_path, reverse  # noqa: E402
from django.utils.decorators import sync_and_async_middleware  # noqa: E402
from django.views.decorators.http import require_safe  # noqa: E402
from django.views.static import serve  # noqa: E402


@sync_and_async_middleware
def stamp(get_response):
    async def middleware(request):
        response = await get_response(request)
        response["x-middleware"] = "on"
        return response

    return middleware


def version(request):
    return HttpResponse(who(VERSION), content_type="text/plain")


@require_safe
async def hello(request, name):
    return JsonResponse({"name": name})


async def anything(request, rest):
    return JsonResponse({"path": request.path, "raw_path": request.scope["raw_path"].decode()})


async def query(request):
    return JsonResponse(dict(request.GET.lists()))


async def json(request):
    return JsonResponse(jsons.loads(request.body), safe=False)


async def form(request):
    return JsonResponse(request.POST.dict())


def upload(request):
    file = request.FILES["file"]
    return JsonResponse({"name": file.name, "note": request.POST["note"], **told(file.read())})


def receive(request):
    return JsonResponse(told(request.read()))


async def stream(request):
    return StreamingHttpResponse(chunks(), content_type="text/plain")


async def break_off(request):
    return StreamingHttpResponse(torn(), content_type="text/plain")


def file(request):
    return FileResponse((HERE / "big.bin").open("rb"))


async def boom(request):
    raise RuntimeError("secret words")


async def big(request):
    return HttpResponse(BIG, content_type="text/plain")


def set_session(request, value):
    request.session["value"] = value
    return HttpResponse(status=204)


def session(request):
    return HttpResponse(request.session.get("value", ""), content_type="text/plain")


async def empty(request):
    return HttpResponse(status=204)


async def unchanged(request):
    return HttpResponseNotModified(headers={"etag": '"1"'})


async def old(request):
    return HttpResponseRedirect(reverse("hello", args=["new"]))


async def slow(request):
    SEEN.append("slow has begun")
    try:
        await asyncio.sleep(600)
    finally:
        SEEN.append("slow")


async def sse(request):
    async def events():
        try:
            while True:
                yield "data: tick\n\n"
                await asyncio.sleep(0.02)
        finally:
            SEEN.append("sse")

    return StreamingHttpResponse(events(), content_type="text/event-stream")


async def seen(request):
    return JsonResponse(SEEN, safe=False)


async def slash(request):
    return HttpResponse("slash")


urlpatterns = [
    path("version", version),
    path("hello/<name>", hello, name="hello"),
    path("anything/<path:rest>", anything),
    path("query", query),
    path("json", json),
    path("form", form),
    path("upload", upload),
    path("receive", receive),
    path("stream", stream),
    path("break-off", break_off),
    path("file", file),
    path("boom", boom),
    path("big", big),
    path("session", session),
    path("session/<value>", set_session),
    path("empty", empty),
    path("unchanged", unchanged),
    path("old", old),
    path("slow", slow),
    path("sse", sse),
    path("seen", seen),
    path("slash/", slash),
    re_path("^static/(?P<path>.*)$", serve, {"document_root": STATIC}),
]

app = get_asgi_application()
