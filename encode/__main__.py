"""python -m encode: the commands, in the order in which a person needs them."""

COMMANDS = {
    "demo": "Draw the generated photographs, which need no download.",
    "selftest": "Can this machine's GPU be trusted?",
    "main": "A folder of captioned photographs to one data set a resolution.",
    "doctor": "Read a data set back, and mend what is damaged.",
    "subset": "Choose the images of the nano run.",
}

if __name__ == "__main__":
    for name, words in COMMANDS.items():
        print(f"python -m encode.{name:<9} {words}")
    print("Each of them explains itself with --help.")
