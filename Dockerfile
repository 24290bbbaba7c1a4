FROM python:3.11-slim

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

WORKDIR /app

# cpu, or gpu for models stored as float16 on NVIDIA's: then run it with `--gpus all`.
ARG RUNTIME=cpu

# Dependencies first, so that an edited source file does not install them anew.
COPY pyproject.toml LICENSE ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *project['optional-dependencies']['${RUNTIME}'], sep='\n')" > requirements.txt \
    && pip install -r requirements.txt

COPY wattle.py ./
COPY energy energy
COPY service service
COPY models models
# The user below may not write here, so Python would compile all of it at every start.
RUN pip install --no-deps -e . \
    && python -m compileall -q wattle.py energy service models \
    && useradd --uid 10001 --create-home wattle

USER wattle

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]

# Others can reach a container, so it wants API keys, in a folder that is mounted: -v ./keys:/keys:ro
# -e WATTLE_API_KEYS_FILE=/keys/keys.toml. For a trial that only this machine can reach, -p 127.0.0.1:8000:8000
# -e WATTLE_INSECURE=true. With neither it says so and stops.
#
# The list form has no shell in between, so SIGTERM reaches the service, which then finishes what runs:
# give it the time that its setting allows for that, `docker stop --time 40`.
CMD ["wattle", "serve", "--host", "0.0.0.0", "--port", "8000"]
