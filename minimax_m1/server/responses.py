"""POST /v1/responses."""

from fastapi import APIRouter

router = APIRouter()
