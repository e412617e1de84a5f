"""Three days of a shop that grows: every day brings users, an item, a tag and a city that no day before has had."""

import datetime as dt
import random

from shop import build, write_shop

FIRST_DATE = dt.date(2023, 11, 15)
DATES = [FIRST_DATE + dt.timedelta(days=day) for day in range(3)]
_MIDNIGHT = 1_700_006_400  # Of the first date, UTC.
_ROWS = 300


def day_tables(day):
    """(log, users, items) of a day: 300 events, 4 minutes apart; even items are clicked three times as often."""
    draw = random.Random(day)
    items, users = 8 + day, 30 + 5 * day
    log = []
    for k in range(_ROWS):
        item = draw.randrange(items)
        log.append(
            {
                "user_id": f"u{draw.randrange(users)}",
                "item_id": f"i{item}",
                "time": _MIDNIGHT + 86_400 * day + 240 * k,
                "clicked": int(draw.random() < (0.2 if item % 2 else 0.6)),
                "seconds": 30.0 if k % 6 == 0 else 1.5,
                "weight": 1.0,
            }
        )
    cities = ("Rome", "Oslo", "Paris", "Bern", "Kyiv")[: 3 + day]
    user_rows = [{"user_id": f"u{k}", "age": 15 + k, "city": cities[k % len(cities)]} for k in range(users)]
    item_rows = [{"item_id": f"i{k}", "tags": f"a|t{k}", "price": 1.5 + k} for k in range(items)]
    return log, user_rows, item_rows


def build_days(spec, directory):
    """Raw tables and datasets of the three days, each grown from the one before: paths by date, and DatasetDirs."""
    datasets = []
    for day, date in enumerate(DATES):
        raw = write_shop(directory / f"raw-{date}", *day_tables(day))
        grow_from = datasets[-1].path if datasets else None
        datasets.append(build(spec, raw, directory / "datasets" / str(date), grow_from=grow_from))
    return datasets
