"""Writes the demo data set: a customer's mail in, one line of JSON out. Knows templates and no model.

The job: read a short support mail and give `{"name", "order", "product", "issue"}`, where `issue` is one of
`ISSUES`. The first three are copied from the mail; the fourth is judged from what the customer says.

What the held-out rows share with training: the instruction, the four keys, the five issues, the colours and
how a mail is put together. What they do not share (tests/test_demo_dataset.py checks all of it):

- sentences: every greeting, issue sentence, way to name the order, remark and farewell is written for one
  side only. With name, order and product masked, no sentence of a held-out mail occurs in training;
- first names and family names, also in other combinations;
- products (a colour and a noun): no noun of one side contains a word of a noun of the other;
- order numbers: no value on both sides, and one number format (`2024-317`) occurs in held-out rows only.

Usage: python tools/make_support_mail.py [--seed N] [--train N] [--heldout N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = "Read the customer mail and answer with JSON: name, order, product, issue."
KEYS = ("name", "order", "product", "issue")
ISSUES = ("late", "damaged", "wrong item", "return", "cancel")
OUT = Path(__file__).resolve().parent.parent / "src" / "prefixtune" / "datasets"


@dataclass(frozen=True, kw_only=True)
class Phrases:
    """All that one side (training or held-out) may say. {p} product, {o} order, {r} room for `inline`."""

    first_names: tuple[str, ...]
    family_names: tuple[str, ...]
    nouns: tuple[str, ...]  # a product is a colour and a noun
    order_formats: tuple[str, ...]  # 9 a digit, A a letter, anything else itself
    greetings: tuple[str, ...]
    introductions: tuple[str, ...]  # of the customer, where a line begins: {n}
    issues: dict[str, tuple[str, ...]]
    inline: tuple[str, ...]  # names the order inside the issue sentence
    references: tuple[str, ...]  # names the order in a sentence of its own
    remarks: tuple[str, ...]  # true of any issue
    farewells: tuple[str, ...]  # before a signature
    thanks: tuple[str, ...]  # a last line where the name stood in the body


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(","))


COLOURS = _words("red, blue, green, black, white, grey, yellow, brown, pink, purple, silver, orange")

TRAIN = Phrases(
    first_names=_words("""
        Anna, Ben, Carla, David, Elif, Frank, Grace, Hassan, Irene, Jonas, Katya, Liam, Maria, Nadia,
        Oscar, Paula, Quentin, Rosa, Samuel, Tessa, Umar, Vera, Walter, Xenia, Yusuf, Zoe, Amir,
        Bianca, Cheng, Dolores, Emil, Fatima, Gustav, Helen, Ivan, Julia, Kenji, Lena, Martin, Nora,
        Omar, Priya, Rafael, Sonja, Tom, Uma, Viktor, Wendy, Yara, Marcus, Daniel, Emma, Peter, Sarah,
        James, Linda, Robert, Susan, Michael, Karen, Abdul, Adele, Agnes, Akira, Alba, Alejandro,
        Amelia, Anders, Andrea, Arjun, Astrid, Aurora, Bernd, Bilal, Birgit, Bogdan, Camille, Carmen,
        Cedric, Chiara, Christof, Claudia, Cora, Cyril, Dagmar, Dario, Deepak, Denise, Dina, Edith,
        Eduardo, Eleni, Eric, Erika, Ewa, Fabio, Farid, Fiona, Flora, Gabriel, Georg, Gerda, Giulia,
        Greta, Hana, Harold, Heidi, Henrik, Ibrahim, Ida, Igor, Ilse, Imran, Ingrid, Isabel, Jamal,
        Jasmin, Jerome, Joanna, Jorge, Kaito, Kamal, Keiko, Kirsten, Lars, Layla, Leon, Lorenzo, Lucia,
        Magnus, Malik, Manuel, Marta, Milan, Mohan, Monika, Naomi, Nikolai, Noah, Olga, Otto, Pavel,
        Pedro, Rania, Renata, Ruth, Sabine, Salma, Sergio, Silvia, Stefan, Sven, Tamara, Tariq, Theo,
        Tina, Valentina, Wei, Zara, Mae, Lin, Bo"""),
    family_names=_words("""
        Kowalski, Smith, Garcia, Meyer, Yilmaz, Novak, Brown, Haddad, Rossi, Lindberg, Petrova, Murphy,
        Silva, Khan, Jensen, Moreau, Okafor, Tanaka, Weber, Clark, Santos, Ivanov, Larsen, Patel,
        Fischer, Nguyen, Costa, Walker, Bauer, Ortiz, Dubois, Kim, Adams, Schulz, Rahman, Evans, Conti,
        Berg, Lopez, Turner, Zhang, Becker, Hughes, Marino, Cohen, Popescu, Reed, Vargas, Hansen, Ali,
        Morgan, Klein, Ferrari, Young, Wright, Bell, Abbott, Acosta, Almeida, Baran, Barros, Blanc,
        Borg, Bose, Brandt, Campbell, Castro, Chaudhary, Cruz, Dahl, Daniels, Delgado, Dietrich,
        Dvorak, Eriksen, Farouk, Fontaine, Foster, Gallo, Gomez, Grant, Gruber, Gupta, Hartmann,
        Hayashi, Herrera, Hoffmann, Horvat, Ito, Jankowski, Jimenez, Kapoor, Keller, Kovacs, Krause,
        Lambert, Lehmann, Lund, Mahmoud, Marchetti, Mbeki, McKay, Mori, Nielsen, Obi, Olsen, Park,
        Pires, Quinn, Ramirez, Richter, Rivera, Rojas, Roth, Saito, Sato, Seidel, Sharma, Simon, Stone,
        Suzuki, Torres, Urban, Vidal, Vogt, Watanabe, White, Winter, Wolf, Yamada, Ziegler"""),
    nouns=_words("""
        lamp, mat, hose, grinder, helmet, scale, blanket, bottle, jacket, stove, toaster, kettle,
        backpack, keyboard, knife, pot, clock, curtain, dryer, printer, racket, suitcase, pillow,
        wallet, sleeping bag, picture frame, drill, bowl, fish tank, dog bed, cat tree, mirror,
        bookshelf, coat, tea towel, vase, mattress, rice cooker, doormat, calculator, wheelbarrow,
        hammock, flower box, bird feeder, blender, bracelet, broom, bucket, cake tin, carpet, cushion,
        dart board, camera, dress, dumbbell, timer, fishing rod, vest, folding table, football, globe,
        grill, hand mixer, cap, hoodie, lantern, loudspeaker, microwave, mosquito net, music box,
        necklace, notebook, pepper mill, puzzle, quilt, razor, robot, router, shelf, ring, sofa,
        spice jar, stapler, stroller, surf board, tent, thermometer, torch, trolley, truck, ukulele,
        whiteboard, webcam, scarf, wok"""),
    order_formats=("99999", "9999", "A9999", "AA999", "A-9999", "AA-999", "999999"),
    greetings=_lines("""
        Hi,
        Hello,
        Hey,
        Dear team,
        Good morning,
        Hi there,
        Dear Sir or Madam,
        To whom it may concern,
        Hi support,
        Hello team,
        Dear shop,
        Good day,"""),
    introductions=_lines("""
        {n} here.
        {n} is my name.
        {n} writing to you.
        {n} from Berlin here."""),
    issues={
        "late": _lines("""
            The {p}{r} should have been here last Monday, but nothing has come.
            I am still waiting for the {p}{r}.
            Where is my {p}{r}?
            The delivery date of my {p}{r} passed a week ago.
            It has been three weeks and the {p}{r} is still not here.
            You promised the {p}{r} for Tuesday, today is Friday and I have nothing.
            The tracking page of the {p}{r} has not changed for ten days.
            My {p}{r} has still not arrived.
            I bought the {p}{r} in March and it never reached me.
            The parcel with the {p}{r} seems to be lost on the way.
            How much longer does the {p}{r} take?
            The {p}{r} was due two days ago and the courier has not shown up.
            When will the {p}{r} finally get to me?
            Your site said two days for the {p}{r}, now it is day nine.
            No sign of the {p}{r} so far, and the date you gave is over.
            The {p}{r} is stuck somewhere in the post since last week.
            The {p}{r} is overdue.
            I expected the {p}{r} on Saturday and the mailbox stays empty.
            The driver said he would bring the {p}{r} yesterday, he did not come.
            Delivery of the {p}{r} is taking far too long.
            Every day you tell me the {p}{r} comes tomorrow.
            Can you tell me what happened to the shipment of the {p}{r}? It is not here yet.
            It is the 20th and the {p}{r} was announced for the 8th.
            I am waiting and waiting for the {p}{r}.
            Nobody has brought me the {p}{r} yet.
            The {p}{r} is taking ages to get here.
            My neighbours got theirs, my {p}{r} is nowhere to be seen.
            Did you lose the {p}{r}? I never got it.
            The {p}{r} has been on its way for a month.
            The status of the {p}{r} says in transit, and it has said so for days.
            Please check the delivery of the {p}{r}, it is late.
            I still do not have the {p}{r}.
            My {p}{r} was sent weeks ago and has vanished on the road.
            The courier says he delivered the {p}{r}, but I have nothing.
            The {p}{r} was to be here on Wednesday, it was not.
            In your message you wrote that the {p}{r} arrives on Sunday, that was false.
            Did the {p}{r} get lost?
            It has been ages since I paid and I have no {p}{r}.
            No {p}{r} in my post today either.
            The {p}{r} did not come in time for the birthday.
            The {p}{r} did not arrive on the day you named.
            Please speed up the {p}{r}, I have waited long enough.
            A month later the {p}{r} is still on the road.
            Your delivery of the {p}{r} is very slow.
            The shipping of the {p}{r} takes forever.
            The {p}{r} was announced for May, we have June now.
            I never got the {p}{r}.
            The {p}{r} has never come to my door.
            The {p}{r} is late.
            The {p}{r} should arrive within a week, it did not.
            The delay of the {p}{r} is a problem for us.
            Can you track the {p}{r}? It should be with me by now.
            The parcel service cannot find the {p}{r}.
            For six days the {p}{r} has been in your depot without moving.
            What is the holdup with the {p}{r}?
            I keep looking out of the window, but the {p}{r} does not come.
            How many weeks must I wait for the {p}{r}?
            You sent the {p}{r} long ago and it did not get here.
            Has the {p}{r} left your store at all? I have been waiting since Easter.
            The {p}{r} is well behind the time you promised."""),
        "damaged": _lines("""
            The {p}{r} arrived broken.
            There is a big crack in the {p}{r}.
            When I opened the box, the {p}{r} was in pieces.
            The {p}{r} does not work at all.
            My {p}{r} came with deep scratches everywhere.
            The {p}{r} stopped working after one day.
            The {p}{r} is bent and cannot be used.
            The parcel was crushed and the {p}{r} inside is ruined.
            I got the {p}{r} today and it is torn.
            Sadly the {p}{r} has a hole in it.
            The {p}{r} is faulty, I tried everything.
            One side of the {p}{r} is smashed.
            The {p}{r} fell apart the first time I used it.
            Your courier must have dropped the {p}{r}, it is dented.
            The {p}{r} you sent me is defective.
            I unpacked the {p}{r} and saw that it had been damaged on the way.
            The {p}{r} reached me wet and full of stains.
            The {p}{r} was already broken when I took it out of the box.
            After ten minutes the {p}{r} made a noise and died.
            The surface of the {p}{r} is chipped in two places.
            Nothing happens with the {p}{r}, it seems to be dead.
            The {p}{r} came apart in my hands, very poor quality.
            The {p}{r} has a broken corner.
            The {p}{r} will not turn on.
            What I unpacked was a {p}{r} full of cracks.
            The glass of the {p}{r} is shattered.
            The {p}{r} got wet in the post and is spoiled.
            The seam of the {p}{r} was ripped open on arrival.
            The {p}{r} makes a burning smell and then fails.
            It took one hour until the {p}{r} broke.
            The {p}{r} seems to have a fault.
            Rough handling in the post has destroyed the {p}{r}.
            The {p}{r} is scratched and one corner is crushed.
            I can see a split along the {p}{r}.
            The {p}{r} does nothing when I switch it on.
            The {p}{r} is broken.
            The {p}{r} gave up on the second day.
            There is a dent in my {p}{r}.
            A dent and a scratch are on the {p}{r}.
            The {p}{r} was squashed in the post.
            The {p}{r} snapped in two.
            The {p}{r} is ripped.
            The {p}{r} leaks.
            The {p}{r} came in a bad state, it is ruined.
            The {p}{r} burst after a minute.
            The paint of the {p}{r} is scratched off.
            The {p}{r} shows cracks all over.
            The back of the {p}{r} is split.
            I used the {p}{r} for an evening and it broke down.
            The {p}{r} no longer works.
            The {p}{r} has been damaged in the mail.
            I have a {p}{r} here that is smashed to bits.
            One edge of the {p}{r} is crushed.
            Even brand new the {p}{r} does not function.
            The {p}{r} was dropped and is now useless.
            The box had a hole and the {p}{r} is dirty and torn.
            The {p}{r} is loose and falls to bits.
            I am holding a broken {p}{r} in my hands.
            The {p}{r} rattles and does not run.
            The {p}{r} died on me within a week."""),
        "wrong item": _lines("""
            I ordered the {p}{r} but got something else.
            You sent me the wrong thing instead of the {p}{r}.
            In the box was not the {p}{r} but another article.
            The {p}{r} came in another colour than I asked for.
            I wanted the {p}{r} and received a bag of cat food.
            This is not the {p}{r} that I paid for, it is a different model.
            The {p}{r} is the wrong size.
            Somebody mixed up the parcels, I got books and not the {p}{r}.
            The label said {p}{r}, the content was a set of spoons.
            Instead of the {p}{r} there was a pair of socks in the parcel.
            You delivered the wrong colour of the {p}{r}.
            I think I got the parcel of another customer, there was no {p}{r} in it.
            The {p}{r} I got is not the one on my invoice.
            I was sent a cheaper version and not the {p}{r} I picked.
            What came is a toy car, what I bought is the {p}{r}.
            The thing in the parcel is not my {p}{r}.
            Why did I get a candle when I ordered the {p}{r}?
            You swapped the {p}{r} for something I never asked for.
            The {p}{r} is not the colour shown in my order.
            The wrong article was packed, it should be the {p}{r}.
            I received the children's version of the {p}{r}, I ordered the adult one.
            A different brand came, not the {p}{r} I selected.
            The {p}{r} was not in the parcel, a strange different thing was.
            My parcel contains somebody else's things instead of the {p}{r}.
            I have got the wrong {p}{r}.
            That is a wrong version of the {p}{r}, please swap it.
            I chose the {p}{r}, the one here looks different.
            You mixed something up, I have a hat here and not the {p}{r}.
            Please exchange it, it is another type than the {p}{r} I ordered.
            The {p}{r} should be size ten, this one is size eight.
            I did not order this, I ordered the {p}{r}.
            The article I got has nothing to do with the {p}{r}.
            I received a plate, which I did not order, and no {p}{r}.
            This is a mistake, my {p}{r} is another one than I ordered.
            Wrong model, I ordered the {p}{r}.
            Someone else's goods were in my box, not the {p}{r}.
            You have sent me a product that is not the {p}{r}.
            My order was the {p}{r}, your parcel had a lamp shade in it.
            I got another model than the {p}{r}.
            The {p}{r} you packed is an old model, not the new one that I chose.
            I asked for the {p}{r} and you sent a hat.
            What I found in the parcel is not the {p}{r}.
            Someone packed the wrong goods, there is no {p}{r} here.
            A stranger's parcel came to me in place of the {p}{r}.
            You sent a different article, I wanted the {p}{r}.
            Not what I ordered: I ordered the {p}{r}.
            The thing I received is nothing like the {p}{r}.
            I have a set of cups here and should have the {p}{r}.
            In place of the {p}{r} I received a rope.
            The article number is wrong, this is not the {p}{r}.
            The {p}{r} that came is a different one from the picture.
            Please send me the right {p}{r}, this is another type.
            I opened the parcel and found shampoo and not the {p}{r}.
            My parcel was for a lady in Rome, my {p}{r} went elsewhere.
            You confused my {p}{r} with some other product.
            The wrong colour came, I ordered the {p}{r}.
            Your parcel holds two forks, but no {p}{r}.
            The {p}{r} is not the version that I selected.
            I paid for the {p}{r} and got a cheap pen.
            The {p}{r} must have gone to someone else, I have his order."""),
        "return": _lines("""
            I would like to send the {p}{r} back.
            I want to return the {p}{r}.
            I do not like the {p}{r} and want my money back.
            How can I return the {p}{r}?
            The {p}{r} is fine but I do not need it any more, can I give it back?
            Please send me a return label for the {p}{r}.
            I changed my mind about the {p}{r} that came yesterday, I want a refund.
            The {p}{r} does not fit my room, so I will send it back.
            I am not happy with the {p}{r}, please take it back.
            The {p}{r} is still unused in its box and I want to return it.
            My wife already has the same {p}{r}, I would like to return ours.
            Which address do I use to send back the {p}{r}?
            I want to use my right to return the {p}{r}.
            Please refund the {p}{r}, I will post it to you tomorrow.
            The {p}{r} is not what I hoped for, how do I get a refund?
            I received the {p}{r} as a gift and want to give it back.
            Can I bring the {p}{r} back and get my money?
            The {p}{r} looks cheap on my table, I will return it.
            I tried the {p}{r} once and it is not for me, please refund it.
            Is it still possible to return the {p}{r}?
            I want to hand the {p}{r} back to you within the two weeks.
            The {p}{r} works but I want a refund, it is not my style.
            The {p}{r} is too small for me, I would like to give it back.
            Do you take the {p}{r} back? I have not used it.
            I want to undo the purchase of the {p}{r} I received, please refund me.
            How long do I have to return the {p}{r}?
            The {p}{r} is too heavy for me, I am going to return it.
            Please tell me how to send the {p}{r} back to your store.
            I am returning the {p}{r}, when do I get my money?
            The {p}{r} was a bad buy, please take it back and refund me.
            The {p}{r} disappoints me, can I get my money back?
            I kept the {p}{r} in its box and wish to return it.
            The {p}{r} is too large, please take it back.
            Where can I find the label to return the {p}{r}?
            I regret the {p}{r} and would like my money back.
            The {p}{r} goes back to you today, please refund the price.
            What are the steps to return the {p}{r}?
            I do not need the {p}{r}, here is my request to return it.
            My family does not like the {p}{r}, so we return it.
            We would like a refund for the {p}{r}.
            Please give me a refund for the {p}{r}, it does not suit me.
            The {p}{r} is nice but I do not want to keep it.
            I will not keep the {p}{r}.
            I would rather have my money than the {p}{r}, may I send it back?
            Can the {p}{r} be returned?
            Please pick up the {p}{r} again, I do not want to keep it.
            The {p}{r} does not suit us and goes back.
            What do I do to return the {p}{r}?
            The {p}{r} is the right one, but I do not like it and want to return it.
            I have repacked the {p}{r} and want to post it back.
            Could you refund the {p}{r}? I do not use it.
            I got two as presents, so I would like to return the {p}{r}.
            Is there a fee when I send the {p}{r} back?
            I have the {p}{r} here unopened and want my money back.
            I want to give up the {p}{r}, how does a return work?
            The {p}{r} is too expensive for what it does, I return it.
            We do not like the look of the {p}{r} at home, please take it back.
            How do I get a return slip for the {p}{r}?
            I would like to exchange the {p}{r} for my money.
            The {p}{r} is not for me, I am posting it to you."""),
        "cancel": _lines("""
            Please cancel the {p}{r}.
            I want to cancel the {p}{r} before you ship it.
            I ordered the {p}{r} by mistake, please stop it.
            Can you cancel my order of the {p}{r}?
            I no longer want the {p}{r}, please do not send it.
            Please delete my order for the {p}{r}, it was a double click.
            I found the {p}{r} cheaper in town, so please cancel it.
            I ordered the {p}{r} an hour ago and want to cancel.
            My son bought the {p}{r} without asking, cancel it please.
            Is it too late to cancel the {p}{r}?
            Please do not ship the {p}{r}, I have changed my mind.
            I need to cancel the {p}{r}, I am moving abroad.
            Stop the order of the {p}{r} please.
            The {p}{r} has not left your store yet, please cancel it.
            Cancel the {p}{r} and keep the rest of my order as it is.
            I clicked twice, one {p}{r} is enough, cancel this one.
            I would like to withdraw my order of the {p}{r} before it goes out.
            I do not want the {p}{r} any more, cancel the purchase.
            How can I cancel the {p}{r} that I ordered this morning?
            Please take the {p}{r} off my order before you pack it.
            The wait is too long, so cancel the {p}{r}.
            Your page shows the {p}{r} as not yet sent, I want to cancel it.
            Please call off the {p}{r}.
            I made an error, I did not want to order the {p}{r}, cancel it.
            Can the order of the {p}{r} still be stopped?
            Please do not pack the {p}{r}, I do not need it now.
            I would like to cancel my purchase, it is the {p}{r}.
            Hold the {p}{r} please, I want to cancel.
            I bought the {p}{r} by accident today, cancel it.
            We cancel the {p}{r}, our plans are different now.
            I got the same {p}{r} from a friend, so please cancel mine before it leaves.
            If it is still with you, cancel the {p}{r}.
            The {p}{r} was ordered by accident, do not send it.
            If you have not sent the {p}{r} yet, stop it.
            I must cancel the {p}{r} of last night.
            Please void my purchase of the {p}{r}.
            I have other plans now, do not send the {p}{r}.
            Please cancel my order, I do not need the {p}{r}.
            I ordered the {p}{r} by accident.
            Do not send me the {p}{r}, it was an accident.
            Please do not send the {p}{r}.
            I do not need the {p}{r} after all, do not ship it.
            It was a mistake to order the {p}{r}, please cancel.
            My order of the {p}{r} is to be cancelled.
            I changed my mind before shipping, cancel the {p}{r}.
            May I cancel the {p}{r}?
            I want to step back from the order of the {p}{r}.
            Annul the order of the {p}{r} please.
            Please remove the {p}{r}, I ordered it twice.
            Do not charge me for the {p}{r}, I cancel it.
            I just ordered the {p}{r} and want to take it back before it is sent.
            Cancel the delivery of the {p}{r}.
            I have no use for the {p}{r} now, please stop the shipping.
            There is no need to send the {p}{r} any longer.
            Can you stop the {p}{r}? I do not want it sent.
            Kids ordered the {p}{r}, do not send it.
            As I lost my job I must cancel the {p}{r}.
            Forget about the {p}{r}, please cancel it today.
            I want out of the purchase of the {p}{r}, it is not sent yet.
            Please cancel, I picked the {p}{r} by mistake."""),
    },
    inline=(
        " from order {o}",
        " (order {o})",
        " of order number {o}",
        ", order {o},",
        ", number {o},",
        " with the number {o}",
    ),
    references=_lines("""
        My order number is {o}.
        Order {o}.
        The order number is {o}.
        It is about order {o}.
        Order number: {o}.
        I ordered it under number {o}.
        You will find it under {o}.
        My order is {o}.
        The number on the bill is {o}.
        Order no. {o}.
        This was order {o}.
        I am writing about order {o}."""),
    remarks=_lines("""
        Please help.
        What can you do?
        Please let me know what to do next.
        I have been a customer for years.
        I paid 39 euros for it.
        I already called twice.
        Please answer soon.
        I am quite annoyed.
        It was meant as a gift.
        Can you look into it?
        I paid by card.
        I hope you can sort this out.
        This is the second time.
        I live in Berlin.
        Please write back to this address.
        Could somebody reply today?"""),
    farewells=_words("""
        Thanks, Thank you, Regards, Best regards, Best, Yours, Cheers, Kind regards, Greetings,
        Yours sincerely"""),
    thanks=_lines("""
        Thanks.
        Thank you!
        Thank you very much.
        Thanks a lot.
        Many thanks!"""),
)

HELDOUT = Phrases(
    first_names=_words("""
        Aisha, Bruno, Clara, Dmitri, Esther, Felix, Gloria, Hugo, Ines, Jack, Kofi, Laura, Mateo, Nina,
        Oliver, Petra, Ravi, Simone, Thomas, Ursula, Vincent, Yuki, Alan, Brenda, Colin, Diana, Mei,
        Albert, Alice, Beatrice, Carlos, Charles, Cynthia, Dora, Elena, Ernest, Eva, Florian, George,
        Gina, Haruto, Hector, Iris, Jana, Jason, Kevin, Lukas, Lucy, Mark, Miriam, Natalie, Nils,
        Olivia, Patrick, Philip, Rachel, Richard, Roland, Sandra, Sofia, Tobias, Victoria, William"""),
    family_names=_words("""
        Johnson, Nakamura, Schmidt, Pereira, Andersen, Bianchi, Osei, Wagner, Taylor, Fernandez, Kaya,
        Laurent, Sokolov, Singh, Baker, Holm, Romero, Fraser, Leclerc, Mendes, Cooper, Vogel, Hill,
        Chen, Parker, Nowak, Allen, Bennett, Carter, Dias, Edwards, Franco, Fuchs, Gray, Harris, Huber,
        Jackson, Kaminski, Lang, Lee, Lewis, Mason, Miller, Moretti, Neumann, Ozturk, Perez, Peters,
        Phillips, Ricci, Rogers, Sanchez, Schwarz, Scott, Thompson, Vasquez, Ward, Wilson, Wong,
        Zimmermann"""),
    nouns=_words("""
        kite, teapot, shovel, mug, rocking chair, rug, bathrobe, sharpener, umbrella, mouse,
        sandwich maker, ladder, violin, frying pan, ceiling light, lunchbox, file cabinet, oven glove,
        lawn mower, scooter, telescope, piano stool, car charger, radio, skateboard, sun hat,
        snowboard, wetsuit, paddle, canoe, radiator, bicycle, dictionary, fountain pen, eraser, ruler,
        easel, typewriter, record player, flute, trumpet, metronome, padlock, chandelier, tablecloth,
        belt, cardigan, blouse, swimsuit, raincoat, sledge, treadmill, freezer, humidifier, ladle,
        whisk, rolling pin, garlic press"""),
    order_formats=("99999", "9999", "A9999", "AA999", "A-9999", "AA-999", "999999", "2024-999"),
    greetings=_lines("""
        Hello there,
        Dear support team,
        Good afternoon,
        Hey folks,
        Good evening,
        Dear customer service,"""),
    introductions=_lines("""
        {n} speaking.
        {n} again."""),
    issues={
        "late": _lines("""
            I have waited a month for the {p}{r} now.
            The {p}{r} still hasn't turned up.
            According to your mail the {p}{r} would come on Thursday, and it did not.
            Any news about when the {p}{r} will be delivered?
            My {p}{r} is five days behind schedule.
            The postman has brought everything but the {p}{r} this week.
            Why is the shipping of the {p}{r} so slow?
            Has the {p}{r} been lost in transit?
            The {p}{r} never came.
            Two months have gone by without the {p}{r}.
            I was told that the {p}{r} needs three days, that was two weeks ago.
            When can I expect the {p}{r} at last?"""),
        "damaged": _lines("""
            The {p}{r} has arrived cracked and scratched.
            I found the {p}{r} shattered when I unwrapped it.
            The {p}{r} refuses to work.
            The {p}{r} was broken during transport.
            There is a nasty dent in the {p}{r}.
            Only an hour of use and the {p}{r} broke down.
            The {p}{r} has a defect.
            My new {p}{r} is ripped along the edge.
            The {p}{r} I unpacked is badly damaged.
            Half of the {p}{r} is crushed.
            The {p}{r} is leaking and useless.
            Something in the {p}{r} snapped on its first evening."""),
        "wrong item": _lines("""
            You shipped a different product and not the {p}{r}.
            I asked for the {p}{r}, but what I found in the parcel is a frame for posters.
            The colour is wrong, I ordered the {p}{r}.
            That is the wrong model of the {p}{r}.
            There must be a mistake, I received a sponge in place of the {p}{r}.
            My parcel had some other customer's goods in it and not my {p}{r}.
            I got size 38 of the {p}{r} though I ordered 42.
            Not the {p}{r} but a completely different thing was delivered to me.
            The box was labelled for me, but it held a teddy and no {p}{r}.
            I did not get the {p}{r} that I ordered, I got an older model.
            It is the wrong article, mine should be the {p}{r}.
            Instead of my {p}{r} you sent some garden seeds."""),
        "return": _lines("""
            I'd like to return my {p}{r}.
            The {p}{r} isn't right for me and I want to send it back.
            Could I get a refund if I post the {p}{r} back to you?
            What do I have to do to give back the {p}{r}?
            The {p}{r} is too big for our flat, so I want to return it.
            I am sending the {p}{r} back, please return my money.
            I regret buying the {p}{r}, it is unopened, will you take it back?
            Where do I find the return form for the {p}{r}?
            My husband does not like the {p}{r}, can we return it?
            I would like a refund for the {p}{r}, it is not what I need.
            Please arrange the return of the {p}{r}.
            The {p}{r} is lovely but too expensive, I am sending it back."""),
        "cancel": _lines("""
            I'd like to cancel the {p}{r}, please.
            Kindly cancel my purchase of the {p}{r}.
            If the {p}{r} has not been shipped, please cancel it.
            Please don't send the {p}{r}, I ordered it by accident.
            I bought the {p}{r} last night and must cancel it.
            We don't need the {p}{r} after all, cancel the order.
            Could you stop the {p}{r} from being sent out? I changed my plans.
            I have to call off the order for the {p}{r}.
            Kindly stop the {p}{r} before it is shipped.
            I want to cancel this order, I do not need a second {p}{r}.
            Cancel my {p}{r} please, I ordered the wrong one.
            May I still cancel the {p}{r}?"""),
    },
    inline=(" in order {o}", " (no. {o})", " bought under order number {o}", ", reference {o},"),
    references=_lines("""
        The order has the number {o}.
        You can look it up as order {o}.
        My reference: {o}.
        Concerning order {o}.
        Number of the order: {o}."""),
    remarks=_lines("""
        Please advise.
        How do we proceed?
        I paid 54 dollars.
        I would be glad about a quick answer.
        I am rather disappointed.
        I live in Madrid."""),
    farewells=_words("Have a nice day, Warm regards, Sincerely, All the best, With kind regards"),
    thanks=_lines("""
        Thanks for your help.
        Thank you in advance."""),
)


def _order(formats: Sequence[str], rng: random.Random) -> str:
    letters, digits = "ABCDEFGHJKLMNPRSTUVWXYZ", "0123456789"
    pattern = rng.choice(formats)
    return "".join(rng.choice(letters if c == "A" else digits) if c in "A9" else c for c in pattern)


def _typo(template: str, rng: random.Random) -> str:
    """Swaps two inner letters of one longer word; slots have one letter and stay as they are."""
    words = list(re.finditer(r"\b[A-Za-z]{5,}\b", template))
    if not words:
        return template
    start = rng.choice(words).start() + 1
    return template[:start] + template[start + 1] + template[start] + template[start + 2 :]


def _template(issue_sentence: str, phrases: Phrases, rng: random.Random) -> str:
    """One mail with the slots {n}, {o} and {p} still open."""
    inline = rng.random() < 0.45
    sentence = issue_sentence.replace("{r}", rng.choice(phrases.inline) if inline else "")
    body = [re.sub(r",(?=[,.?])", "", sentence)]  # an inline order may bring a comma to where one stands
    if not inline:
        body.insert(rng.randrange(2), rng.choice(phrases.references))
    if rng.random() < 0.35:
        body.append(rng.choice(phrases.remarks))
    greeting = [rng.choice(phrases.greetings)] if rng.random() < 0.75 else []
    if rng.random() < 0.75:
        ending = [rng.choice(phrases.farewells) + ",", "{n}"] if rng.random() < 0.8 else ["{n}"]
    else:
        body.insert(0, rng.choice(phrases.introductions))
        ending = [rng.choice(phrases.thanks)] if rng.random() < 0.6 else []
    mail = "\n".join([*greeting, " ".join(body), *ending])
    if rng.random() < 0.15:
        mail = mail.lower()
    if rng.random() < 0.2:
        mail = _typo(mail, rng)
    return mail


def make_rows(
    phrases: Phrases, count: int, rng: random.Random, *, used: Set[str] = frozenset()
) -> list[dict[str, str]]:
    """`count` rows with every issue equally often; all phrasings of an issue are used before one returns."""
    decks: dict[str, list[str]] = {issue: [] for issue in ISSUES}
    orders = set(used)
    rows = []
    for i in range(count):
        issue = ISSUES[i % len(ISSUES)]
        if not decks[issue]:
            decks[issue] = rng.sample(phrases.issues[issue], len(phrases.issues[issue]))
        template = _template(decks[issue].pop(), phrases, rng)
        name = f"{rng.choice(phrases.first_names)} {rng.choice(phrases.family_names)}"
        product = f"{rng.choice(COLOURS)} {rng.choice(phrases.nouns)}"
        order = _order(phrases.order_formats, rng)
        while order in orders:
            order = _order(phrases.order_formats, rng)
        orders.add(order)
        answer = dict(zip(KEYS, (name, order, product, issue), strict=True))
        mail = template.format(n=name, o=order, p=product)
        rows.append({"instruction": INSTRUCTION, "input": mail, "output": json.dumps(answer)})
    rng.shuffle(rows)
    return rows


def make_sides(seed: int, train: int, heldout: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out rows; a held-out row whose order number occurs in training is drawn again."""
    train_rows = make_rows(TRAIN, train, random.Random(f"{seed} train"))
    used = {json.loads(row["output"])["order"] for row in train_rows}
    return train_rows, make_rows(HELDOUT, heldout, random.Random(f"{seed} heldout"), used=used)


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the support-mail demo data set.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=600, help="training rows (default 600)")
    parser.add_argument("--heldout", type=int, default=120, help="held-out rows (default 120)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder (default: the package's datasets)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train_rows, heldout_rows = make_sides(args.seed, args.train, args.heldout)
    write_rows(args.out / "support_mail.train.jsonl", train_rows)
    write_rows(args.out / "support_mail.heldout.jsonl", heldout_rows)


if __name__ == "__main__":
    main()
