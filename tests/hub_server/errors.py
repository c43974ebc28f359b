"""What the server refuses, in the terms that the client turns into its own exceptions."""


class HubError(Exception):
    """A refusal: an HTTP status, a sentence, and the code by which the client picks an exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **details):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.details = details


class RepositoryNotFoundError(HubError):
    """Missing and invisible repositories look the same; without a token the Hub answers 401."""

    def __init__(self, user: str | None):
        if user is None:
            super().__init__(401, "Invalid username or password.", "RepoNotFound")
        else:
            super().__init__(404, "Repository not found", "RepoNotFound")


class RevisionNotFoundError(HubError):
    def __init__(self, revision: str):
        super().__init__(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class EntryNotFoundError(HubError):
    def __init__(self, message: str):
        super().__init__(404, message, "EntryNotFound")
