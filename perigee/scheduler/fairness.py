"""In which order prompts that wait for the same worker are computed."""

from perigee.scheduler.events import RequestArrived


class Ranks:
    """First come, first served."""

    def rank(self, request: RequestArrived, work_s: float, now: float) -> float:
        """When the request counts as having arrived, in seconds of the Conductor's clock: smaller goes first.

        `work_s` is what its prompt is predicted to take to compute.
        """
        return now - request.age_s
