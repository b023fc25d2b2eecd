"""``freqseg train-fusion``: train the CT/MR fusion networks again."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from FreqSegLib.cli_app import app, session_of


class Networks(str, Enum):
    single = "single-scale"
    multi = "multi-scale"
    both = "both"


class Recipes(str, Enum):
    shipped = "shipped"
    basic = "basic"
    medical = "medical"
    hybrid = "hybrid"
    metric = "metric"


@app.command("train-fusion")
def train_fusion(
    context: typer.Context,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the CT/MR pairs (default: FREQSEG_DATA, else ../shared/data).")
    ] = None,
    work: Annotated[Path, typer.Option(help="Checkpoints, log and curves; a stopped run goes on here.")] = Path(
        "build/fusion"
    ),
    models: Annotated[Path, typer.Option(help="Where the weights and their card go.")] = Path("Resources/Models"),
    network: Annotated[Networks, typer.Option(help="Which network.")] = Networks.both,
    recipe: Annotated[
        Recipes, typer.Option(help="Losses and schedule; 'metric' optimises the metrics it is judged by.")
    ] = Recipes.shipped,
    wave: Annotated[str | None, typer.Option(help="Wavelet (default: the recipe's).")] = None,
    levels: Annotated[int | None, typer.Option(min=1, max=3, help="Wavelet levels (default: the recipe's).")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the slices (default: the recipe's).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the start, the order, crops and flips.")] = 0,
    compare_wavelets: Annotated[
        str | None,
        typer.Option(metavar="WAVES", help="Train in each of these wavelets, comma-separated, and rank; ship nothing."),
    ] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Measure on the test patients too: at the end, when all is chosen.")
    ] = False,
) -> None:
    """Train the CT/MR fusion networks on pairs split by patient, and write weights and model cards."""
    from dataclasses import replace

    from FreqSegLib.evaluation.cases import default_data_folder
    from FreqSegLib.training import fusion_recipe

    session = session_of(context)
    data = data or default_data_folder()
    kinds = ("single-scale", "multi-scale") if network is Networks.both else (network.value,)
    for kind in kinds:
        chosen = fusion_recipe.recipe_for(kind, recipe.value)
        chosen = replace(
            chosen,
            wave=wave or chosen.wave,
            levels=levels or chosen.levels,
            epochs=epochs or chosen.epochs,
            seed=seed,
        )
        folder = work / f"{kind}-{recipe.value}"
        if compare_wavelets:
            waves = [name.strip() for name in compare_wavelets.split(",") if name.strip()]
            rows = fusion_recipe.compare_wavelets(data, folder / "wavelets", chosen, waves, session.say)
            for row in rows:
                session.say(f"{kind} {row['wave']}: score {row['score']:.4f}")
            continue
        done = fusion_recipe.train_fusion(data, folder, models, chosen, session.say, test=test)
        session.say(f"Weights and card are in {done}")
