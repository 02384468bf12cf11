"""A job's samples as the platform's predictions.

Its inserts are plain and nobody numbers them, so what is there is read before anything is sent.
"""

from typing import Any

from agent.net.client import RestClient, Unclear
from agent.net.memos import Memos
from agent.net.poll import told
from protocol.records import Result
from protocol.rest import PREDICTIONS, PREDICTIONS_OF


def rows_of(result: Result, job_id: str, user_id: str, epoch: int) -> list[dict[str, Any]]:
    """Return two predictions a sample: before training, at step 0, and after it. The platform asks for each one's owner."""
    rows: list[dict[str, Any]] = []
    for index, sample in enumerate(result.samples):
        for said, step, at in (("before", 0, 0), ("after", result.step, epoch)):
            if said not in sample:
                continue
            prediction, answer = _text(sample[said]), _text(sample.get("answer"))
            row: dict[str, Any] = {
                "job_id": job_id,
                "user_id": user_id,
                "epoch": at,
                "step": step,
                "sample_index": index,
                "prompt": _text(sample.get("prompt")),
                "prediction": prediction,
                "do_sample": False,
            }
            if answer:
                row["ground_truth"] = answer
                row["exact_match"] = float(prediction.strip() == answer.strip())
            rows.append(row)
    return rows


async def send(memos: Memos, job_id: str, result: Result, *, epoch: int) -> int:
    """Have the platform hold the samples of a completed job, each once; return how many were sent. Raises RestError."""
    if not result.samples:
        return 0
    # What an earlier try sent may still be on its way into the table.
    await memos.settle_down(job_id)
    user_id = str((await told(memos.client, {"job_id": job_id})).get("user_id") or "")
    held = await _held(memos.client, job_id)
    rows = [
        row
        for row in rows_of(result, job_id, user_id, epoch)
        if (row["step"], row["sample_index"]) not in held
    ]
    if rows:
        await memos.call("POST", PREDICTIONS, job_id, {"job_id": job_id, "predictions": rows})
    return len(rows)


async def _held(client: RestClient, job_id: str) -> set[tuple[Any, Any]]:
    """Return step and number of every prediction of the job that is there."""
    held: set[tuple[Any, Any]] = set()
    path, offset = PREDICTIONS_OF.format(job_id=job_id), 0
    while True:
        page = await client.get(f"{path}?limit=50&offset={offset}")
        rows, total = page.get("predictions"), page.get("total_count")
        if not isinstance(rows, list) or not isinstance(total, int):
            raise Unclear(f"GET {path}: the answer is no page of predictions")
        held |= {(row.get("step"), row.get("sample_index")) for row in rows if isinstance(row, dict)}
        offset += len(rows)
        if not rows or offset >= total:
            return held


def _text(value: object) -> str:
    return str(value or "")
