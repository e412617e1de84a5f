"""The command that checks a spec: what it prints of the data names no group of few users."""

import yaml
from commands import run_command
from shop import write_shop


def test_user_groups_of_few_users_are_part_of_other(shop_content, tmp_path):
    raw = write_shop(tmp_path / "raw")
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(shop_content))
    done = run_command("pipelines.check_spec", f"--spec={tmp_path / 'shop.yaml'}", f"--input_dir={raw}")
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("User group city_group (train)") :].split("Ids")[0]
    # The shop has 10 users, fewer than the 20 of the smallest group that is shown. 54 of 160 events are clicks.
    assert "Rome" not in table
    assert [word for word in table.replace("│", " ").split() if word in ("other", "160", "0.3375")] == [
        "other",
        "160",
        "0.3375",
    ]
