"""The Captioner online: an OpenAI-compatible endpoint on Ray Serve, and a page to draw a region on.

    meddam serve --model /weights/DAM-3B                  http://127.0.0.1:8000

Read in this order: config.py (settings), schema.py (what is accepted), reading.py (bytes and numbers -> regions),
describing.py (regions -> captions, through the engine's loop), answers.py (captions -> JSON and streams), app.py (the
routes), guards.py and keys.py (who may send what), deployment.py (Ray Serve), job.py (the command).

Only deployment.py and job.py know Ray: everything else is an ASGI app that tests drive in process.
"""
