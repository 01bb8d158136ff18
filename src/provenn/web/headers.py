"""The headers that every answer has, whoever gives it."""

# No script, style or picture from elsewhere, none inside a page, and no page inside another's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def headers(secure: bool) -> dict[str, str]:
    """By name; with HSTS where readers come by TLS."""
    return HEADERS | ({"Strict-Transport-Security": "max-age=31536000"} if secure else {})
