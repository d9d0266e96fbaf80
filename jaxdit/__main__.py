"""python -m jaxdit: the commands, in the order in which a person needs them."""

COMMANDS = {
    "plan": "Will it fit, and how long will it take?",
    "main": "Train, or go on where a run stopped.",
    "validate": "The gate: does a nano run remember, and hear both conditions?",
    "report": "The page about a run.",
    "sample": "Pictures from a sentence and a reference.",
    "app": "The same in a browser.",
    "evaluate": "Quality in numbers, checkpoint by checkpoint.",
    "export": "The model as a folder for diffusers or ComfyUI, and back.",
}

if __name__ == "__main__":
    for name, words in COMMANDS.items():
        print(f"python -m jaxdit.{name:<9} {words}")
    print("Each of them explains itself with --help.")
